# One H200, about 68 s. Checks and compilations in forked processes (killed at 33 s if one hangs), then times.
export PYTHONPATH=src:. TRITON_CACHE_DIR=/tmp/overlap-cache PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
export OUT=$(realpath -m ${OUT:-out}); mkdir -p $OUT
timeout -k 1 69 python3 go.py
