export PYTHONPATH=src:tests:/tmp/peers TRITON_CACHE_DIR=/tmp/softcap-cache OMP_NUM_THREADS=1
export OUT=${OUT:-/tmp/softcap-out}; mkdir -p $OUT
timeout -k 2 68 python3 sc.py
