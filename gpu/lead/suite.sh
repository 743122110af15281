# suite.sh T1 T2 T3: sanitizers of v3 beside all tests in two parts, then v3 with Triton 3.7.1 (out/peers/t371)
export LEAD_GPUS=$(nvidia-smi -L | wc -l) PYTHONPATH=src:scratch OMP_NUM_THREADS=1 TRITON_CACHE_DIR=/tmp/cache-suite
[ -d /tmp/cudapk ] && export PYTHONPATH=$PYTHONPATH:/tmp/cudapk
( for t in racecheck memcheck synccheck; do s=$SECONDS; CUDA_VISIBLE_DEVICES=0 timeout -s INT -k 5 $(( $1 + $2 - 20 )) python3 -m pytest "tests/test_gpu.py::test_compute_sanitizer" -k "$t and v3" -q -W ignore -p no:cacheprovider --tb=short > $OUT/san_$t.txt 2>&1; echo $t $(tail -1 $OUT/san_$t.txt) $((SECONDS-s)) s; done ) &
N=$(( $(nproc) - 3 ))
COMMON="-p rotate -n $N --dist worksteal -v -W ignore -p no:cacheprovider --tb=short --ignore tests/test_compile.py --ignore tests/test_tiles.py --ignore tests/test_architecture.py --ignore tests/test_cli.py --deselect tests/test_gpu.py::test_compute_sanitizer"
OTHERS="v1 or v2_torch or v2_atomic"
report() { tail -1 $1 | cut -c1-300; grep -E "^(FAILED|ERROR)" $1 | cut -c1-210 | sort -u | head -40; grep -oE "\] (PASSED|FAILED|SKIPPED|ERROR)" $1 | sort | uniq -c; }
timeout -s INT -k 25 $1 python3 -m pytest tests $COMMON --ignore tests/test_cuda_kernel.py --ignore tests/test_bench.py -k "not ($OTHERS) and not machine_code and not first_call" > $OUT/suite_a.txt 2>&1
report $OUT/suite_a.txt; date
timeout -s INT -k 25 $2 python3 -m pytest tests $COMMON -k "($OTHERS or test_bench or test_cuda_kernel) and not machine_code and not first_call" > $OUT/suite_b.txt 2>&1
report $OUT/suite_b.txt; date; wait
xz -T0 $OUT/suite_a.txt $OUT/suite_b.txt
