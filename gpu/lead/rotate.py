"""pytest plugin: every worker of xdist sees all GPUs, in an order of its own."""
import os
n = int(os.environ.get("LEAD_GPUS", "1"))
w = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]
k = int(w) % n
os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str((k + i) % n) for i in range(n))
