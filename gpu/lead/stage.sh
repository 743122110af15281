# stage.sh NAMES: copies requests into main's scratch
cd /work/main; rm -rf scratch; mkdir -p scratch/gpu out/peers
cp /tmp/w/lead/lanes.py scratch/
for n in "$@"; do mkdir -p scratch/gpu/$n; (cd /tmp/w/gpu/$n && tar c --exclude=__pycache__ --exclude=./out --exclude=output.txt --exclude=.git --exclude=lead_out .) | tar x -C scratch/gpu/$n; done
du -sh scratch scratch/gpu/*
