# One H200, 110 s: pytest of the kept maximum (12 processes), then times. src, tests: branch s8-moves (fp16 too)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TRITON_CACHE_DIR=/tmp/fp16-cache
export OUT=$(realpath -m ${OUT:-out}); mkdir -p $OUT
PYTHONPATH=src:tests timeout -k 1 85 python3 -m pytest tests/test_v3_kept.py -n 12 -q -o addopts= -p no:cacheprovider -W ignore --tb=short -k "not machine_code" > $OUT/pytest.txt 2>&1; tail -6 $OUT/pytest.txt | cut -c1-300
PYTHONPATH=src:. timeout -k 1 70 python3 go.py 0 1 68
