"""Runs of several processes: what their measurements need of torch.distributed."""
