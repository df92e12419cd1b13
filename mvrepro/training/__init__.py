"""Training: one loop for every profile, alone or under torchrun. docs/scale.md says how to use it.

config      every setting, its meaning and its range
tasks       what a run trains on and how its embeddings are judged
ranks       the processes of a run: who they are, what they agree on, who speaks
batches     which image comes when, and having it on the device in time
logs        what is known of a run while it trains: its course, its pace, the log
network     backbone, head and one step of both
testing     the test of a network that is being trained
checkpoint  the state of all ranks on disk, whole or not there
loop        all of it together: train(config) -> record
"""
