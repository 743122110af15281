export PYTHONPATH=src:. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TRITON_CACHE_DIR=/tmp/rolls2
export OUT=$(realpath -m ${OUT:-out}); mkdir -p $OUT
timeout -k 1 100 python3 go.py 0 1 98
