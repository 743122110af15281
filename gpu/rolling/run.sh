export PYTHONPATH=src:tests:/tmp/peers TRITON_CACHE_DIR=/tmp/rolling-cache OMP_NUM_THREADS=1
export OUT=${OUT:-/tmp/rolling-out}; mkdir -p $OUT
timeout -k 2 64 python3 roll.py
