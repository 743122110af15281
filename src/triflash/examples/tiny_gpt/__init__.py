"""A byte-level GPT trained twice, through triflash and through PyTorch's attention.

Run as `triflash train`. `model` is the network, `data` the text, `loop` one training run, `sample`
the generation of text, `plot` the figure, and `train` the job and its command line.
"""
