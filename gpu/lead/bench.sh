# bench.sh TOTAL KINDS...: overhead, paper, d256 (its full cells), variants, tflops,error,... one after the other; records in ONE archive, also when time is over.
# Needs scratch/COMMIT, scratch/fb3.py, peers unpacked, cuda_v1's package in /tmp/cudapk
export LEAD_GPUS=$(nvidia-smi -L | wc -l) COMMIT=$(cat scratch/COMMIT) TRITON_CACHE_DIR=/tmp/cache-s8 PYTHONWARNINGS=ignore
export PYTHONPATH=src:tests:/tmp/peers:/tmp/peers/nvidia_cutlass_dsl/dsl_packages:/tmp/cudapk
B=$SECONDS; TOTAL=$1; shift; REAL=$OUT; export OUT=/tmp/records; mkdir -p $OUT; LOG=$OUT/bench.txt
pack() { tar czf $REAL/records.tar.gz -C /tmp/records .; }
trap pack EXIT TERM INT
python3 -c "import torch,triton,triflash; torch.randn(8,device='cuda')"
for kind in "$@"; do
  LEFT=$(( TOTAL - (SECONDS-B) )); [ $LEFT -gt 15 ] || break
  case $kind in
    overhead) CUDA_VISIBLE_DEVICES=0 timeout $LEFT python3 scratch/fb3.py overhead $((LEFT-5)) 0 >> $LOG 2>&1;;
    warm) OMP_NUM_THREADS=1 timeout 60 python3 benchmarks/warm_variants.py 12 50 8192 > $OUT/warm.txt 2>&1;;
    *) timeout $LEFT python3 scratch/fb3.py $kind $((LEFT-6)) >> $LOG 2>&1;;
  esac
  echo $kind $((SECONDS-B)); pack
done
grep -E "done|out of time|Error|error" $LOG | cut -c1-200 | tail -14
