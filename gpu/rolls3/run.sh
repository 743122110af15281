export PYTHONPATH=src:. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TRITON_CACHE_DIR=/tmp/rolls3
export OUT=$(realpath -m ${OUT:-out}); mkdir -p $OUT
timeout -k 1 70 python3 go.py 0 1 68
M=sm__cycles_elapsed.max,sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active,lts__t_sectors_op_read.sum,lts__t_sector_hit_rate.pct,dram__bytes_read.sum,lts__t_requests_srcunit_tex.sum,lts__throughput.avg.pct_of_peak_sustained_elapsed
for v in base roll rd; do timeout 25 /usr/local/cuda/bin/ncu --clock-control none -k regex:forward_kernel -s 2 -c 1 --metrics $M python3 go.py 0 1 9 "d96 full" $v 2>&1 | grep -E "cycles|pct|sum" | awk -v v=$v '{print v, $1, $NF}'; done
for v in base roll; do timeout 25 /usr/local/cuda/bin/ncu --clock-control none -k regex:forward_kernel -s 2 -c 1 --metrics $M python3 go.py 0 1 9 "d96 8192" $v 2>&1 | grep -E "cycles|pct|sum" | awk -v v=$v '{print "causal", v, $1, $NF}'; done
