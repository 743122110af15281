# One H200, 40 s. Correctness first (four processes, and two of pytest; what hangs is killed), then times, in turns.
export TRITON_CACHE_DIR=/tmp/ordered2-cache PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 T0=$(date +%s)
export OUT=$(realpath -m ${OUT:-out}); mkdir -p $OUT; rm -f $OUT/pytest.done
(PYTHONPATH=src:tests timeout -k 1 25 python3 -m pytest tests/test_v3.py -n 2 -k "windows_whose_programs_finish" -q -o addopts= -p no:cacheprovider -W ignore --tb=short > $OUT/pytest.txt 2>&1; touch $OUT/pytest.done) &
PYTHONPATH=src:. timeout -k 1 43 python3 run.py; wait
tail -4 $OUT/pytest.txt | cut -c1-300
echo "all $(( $(date +%s) - T0 )) s"
