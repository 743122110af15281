# One H200, 60 s. Correctness first (what hangs is killed), then main against ordered, then the form of the fifth session.
export TRITON_CACHE_DIR=/tmp/ordered-cache PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 T0=$(date +%s)
export OUT=$(realpath -m ${OUT:-out}); mkdir -p $OUT
(PYTHONPATH=src:tests timeout -k 1 29 python3 -m pytest tests/test_v3.py -n 4 -k "windows_whose_programs_finish" -q -o addopts= -p no:cacheprovider -W ignore --tb=short > $OUT/pytest.txt 2>&1) &
(sleep 12; OUT=$OUT/port PYTHONPATH=port/src:. timeout -k 1 15 python3 -c "import run; run.make(run.V)" port > /dev/null 2>&1) &  # compiles only
PYTHONPATH=src:. timeout -k 1 52 python3 run.py; wait
tail -4 $OUT/pytest.txt | cut -c1-300
OUT=$OUT/port PYTHONPATH=port/src:. timeout -k 1 12 python3 run.py port
echo "all $(( $(date +%s) - T0 )) s"
