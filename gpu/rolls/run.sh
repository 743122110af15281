# 2 GPUs (or one: both halves in turn), about 95 s.
export PYTHONPATH=src:. PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
export OUT=$(realpath -m ${OUT:-out}); mkdir -p $OUT
for h in 0 1; do CUDA_VISIBLE_DEVICES=$h TRITON_CACHE_DIR=/tmp/rolls-$h timeout -k 1 ${1:-100} python3 go.py $h 2 ${2:-95} > $OUT/half$h.txt 2>&1 & done; wait
cat $OUT/half0.txt $OUT/half1.txt
