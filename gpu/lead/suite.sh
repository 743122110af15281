# suite.sh TA TB: all tests in two parts, N processes (32 cores: 30; 16 cores: 14; nproc obeys OMP_NUM_THREADS, so ask before); kills itself if there are no workers. Needs scratch/rotate.py
N=$(( $(env -u OMP_NUM_THREADS nproc) - 2 )); export LEAD_GPUS=$(nvidia-smi -L | wc -l) PYTHONPATH=src:scratch:/tmp/cudapk OMP_NUM_THREADS=1 TRITON_CACHE_DIR=/tmp/cache-suite
COMMON="-p rotate -n $N --dist worksteal -v -W ignore -p no:cacheprovider --tb=short --durations=12 --ignore tests/test_compile.py --ignore tests/test_tiles.py --ignore tests/test_architecture.py --ignore tests/test_cli.py --ignore tests/test_docs.py --deselect tests/test_gpu.py::test_compute_sanitizer"
OTHERS="v1 or v2_torch or v2_atomic"
report() { grep -m1 -oE "[0-9]+ workers \[[0-9]+ items\]" $1; tail -1 $1 | cut -c1-300; grep -E "^(FAILED|ERROR)" $1 | cut -c1-230 | sort -u | head -40; grep -oE "\] (PASSED|FAILED|SKIPPED|ERROR)" $1 | sort | uniq -c; grep -E "^[0-9.]+s (call|setup)" $1 | head -6; }
guard() { sleep 50; grep -q "$N workers" $1 || { echo "no workers"; pkill -INT -f "pytest tests"; }; }
( for t in racecheck memcheck synccheck; do s=$SECONDS; CUDA_VISIBLE_DEVICES=0 timeout -s INT -k 5 200 python3 -m pytest "tests/test_gpu.py::test_compute_sanitizer" -k "$t and v3" -q -W ignore -p no:cacheprovider --tb=short > /tmp/san_$t.txt 2>&1; echo $t $(tail -1 /tmp/san_$t.txt) $((SECONDS-s)) s; done ) &
guard $OUT/suite_a.txt &
timeout -s INT -k 25 $1 python3 -m pytest tests $COMMON --ignore tests/test_cuda_kernel.py --ignore tests/test_bench.py -k "not ($OTHERS) and not machine_code and not first_call" > $OUT/suite_a.txt 2>&1
report $OUT/suite_a.txt; echo $SECONDS s
guard $OUT/suite_b.txt &
timeout -s INT -k 25 $2 python3 -m pytest tests $COMMON -k "($OTHERS or test_bench or test_cuda_kernel) and not machine_code and not first_call" > $OUT/suite_b.txt 2>&1
report $OUT/suite_b.txt; echo $SECONDS s
pkill -f "sleep 50"; wait; cat /tmp/san_*.txt | grep -E "passed|failed"; xz -T0 $OUT/suite_a.txt $OUT/suite_b.txt
