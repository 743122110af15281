# bench.sh TOTAL: overhead alone, variants, SEEDS. Needs scratch/COMMIT, scratch/fb3.py, peers unpacked, cuda_v1's package in /tmp/cudapk
export LEAD_GPUS=$(nvidia-smi -L | wc -l) COMMIT=$(cat scratch/COMMIT) TRITON_CACHE_DIR=/tmp/cache-s7 PYTHONWARNINGS=ignore
export PYTHONPATH=src:tests:/tmp/peers:/tmp/peers/nvidia_cutlass_dsl/dsl_packages:/tmp/cudapk
B=$SECONDS; LOG=$OUT/bench.txt
python3 -c "import torch,triton,triflash; torch.randn(8,device='cuda')"
CUDA_VISIBLE_DEVICES=0 timeout 70 python3 scratch/fb3.py overhead 60 0 >> $LOG 2>&1; echo overhead $((SECONDS-B))
OMP_NUM_THREADS=2 timeout 55 python3 benchmarks/warm_variants.py $(( $(nproc)/4 )) 45 8192 > $OUT/warm.txt 2>&1; echo warm $((SECONDS-B))
timeout 150 python3 scratch/fb3.py variants 140 >> $LOG 2>&1; echo variants $((SECONDS-B))
LEFT=$(( ${1:-420} - (SECONDS-B) ))
[ $LEFT -gt 15 ] && timeout $((LEFT+8)) python3 scratch/fb3.py runtime,tflops,backward-step,latency,memory,error $LEFT >> $LOG 2>&1; echo all $((SECONDS-B))
grep -E "done|out of time|Error|error" $LOG | cut -c1-200 | tail -12
