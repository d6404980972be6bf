"""Parallelism: one file per strategy. ``plan.py`` applies the strategies to a model, in order.

| file                              | owns                                                                                |
|-----------------------------------|-------------------------------------------------------------------------------------|
| ``data_axis.py``                  | ZeRO-1.5 and FSDP: where gradients are reduced over the data ranks, and weights are |
|                                   | gathered                                                                            |
| ``accumulated.py``                | the gradients that ``fully_shard`` adds up over the passes of a step                |
| ``prefetch.py``                   | what FSDP gathers in advance                                                        |
| ``tensor.py``                     | mtp, msp, fsp: heads and columns over the tensor ranks                              |
| ``isp.py``, ``gathered.py``       | isp: sequences over the tensor ranks, weights over the weight ranks; its prefetch   |
| ``expert.py``                     | experts over ranks: which rank has which experts, and how tokens travel             |
| ``recompute.py``                  | activation recomputation                                                            |
| ``schedule.py``, ``pipeline.py``  | how micro-batches go through the model, or through the stages of a pipeline         |
| ``orders.py``, ``stages.py``      | the order of passes of each pipeline schedule; which layers are in which stage      |
| ``messages.py``, ``deferred.py``  | what pipeline ranks send; gradients of weights that are computed later              |
| ``layout.py``, ``views.py``       | which ranks belong together                                                         |
| ``collectives.py``, ``shards.py`` | collectives as autograd functions; this rank's part of a tensor                     |
| ``memory.py``, ``strategy.py``    | memory and collectives of a step by formula                                         |
| ``launcher.py``, ``world.py``,    | what torchrun or Slurm says about this process; joining the processes of a run      |
| ``gloo.py``, ``turns.py``         | and what its ranks do one after the other                                           |
"""
