"""What a training run needs before it is started: memory by part, a layout of processes, time. Needs no torch."""
