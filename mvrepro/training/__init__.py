"""Training at the paper's scale: python -m mvrepro scale, alone or under torchrun. docs/scale.md says how.

    config     every setting, and which of them may change when a run goes on
    ranks      the processes of a run: who they are, what they agree on, who speaks
    data       which image comes when, and reading it without keeping the device waiting
    network    backbone, head and one step of both
    snapshots  the state of all ranks on disk, whole or not there
    verify     accuracy on pair sets while training
    logs       JSON lines, and TensorBoard
    loop       all of it together
    overhead   what the loop costs on top of the backbone

Nothing outside this package and its command imports it: the committed runs depend on mvrepro.training.train alone.
"""
