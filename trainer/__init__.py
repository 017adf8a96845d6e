"""Training jobs: recipes, the driver, the DeepSpeed loop, and the `slipstream` command.

command      cli, recipe, console (what is shown), summary (what a run ends with)
driver       job (the run in one file), preparation, output, cluster, reaper, observer, evaluations
each rank    rank (the actor), training (puts it together), loop (the training loop), distributed, schedule, figures
its samples  prefetch, depth (how far ahead), loading (leases), packing_order (which go together), packing (which row
             goes where), assembly (reads them there), collate (the micro-batch, to the GPU)
evaluation   replicas (decode on Ray), eval_console (progress and the table)
checkpoints  checkpoint (where they lie), saving (what is in them), provenance
"""
