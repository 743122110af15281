"""Run scratch/gpu/NAME/run.sh of all requests on the GPUs there are, one at a time each; longest lanes first."""
import os, subprocess, sys, threading, queue, time, pathlib, tarfile
root = pathlib.Path("scratch/gpu").resolve()
gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip().splitlines()
print(len(gpus), gpus[0], flush=True)
limit = float(sys.argv[1])
start = time.time()
q = queue.Queue()
order = sys.argv[2:]
for name in order: q.put(name)
result = {}
def lane(g):
    while True:
        try: name = q.get_nowait()
        except queue.Empty: return
        left = limit - (time.time() - start)
        out = root / name / "lead_out"; out.mkdir(exist_ok=True)
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(g), "OUT": str(out), "PYTHONPATH": "src:/tmp/peers:/tmp/peers/nvidia_cutlass_dsl/dsl_packages", "TRITON_CACHE_DIR": f"/tmp/cache-{name}", "TMPDIR": "/tmp", "OMP_NUM_THREADS": "2"}
        t = time.time()
        with open(out / "output.txt", "w") as f:
            try:
                rc = subprocess.run(["timeout", "-k", "5", str(int(max(left, 5))), "bash", "run.sh"], cwd=root / name, env=env, stdout=f, stderr=subprocess.STDOUT).returncode
            except Exception as e: rc = repr(e)
        result[name] = (g, rc, round(time.time() - t, 1))
        print(name, result[name], flush=True)
threads = [threading.Thread(target=lane, args=(g,)) for g in range(max(1, len(gpus)))]
[t.start() for t in threads]; [t.join() for t in threads]
with tarfile.open(os.environ["OUT"] + "/all.tar.gz", "w:gz") as tar:
    for name in order:
        tar.add(root / name / "lead_out", arcname=name)
for name in order:
    text = (root / name / "lead_out" / "output.txt").read_text()
    print("=====", name, result.get(name)); print(text[-1500:])
