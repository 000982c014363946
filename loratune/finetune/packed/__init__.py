"""The packed engine: many adapters of different hyperparameters trained together on one frozen base.

layout      token sequences of several adapters laid end to end: a flat batch, no padding
attention   each sequence sees itself only, in a flat batch
delta       the adapters' part of a linear layer, forward and backward, each adapter on its own rows
head        loss at response positions through the frozen output head, a chunk of logits at a time
adapter     one adapter: flat storage, AdamW, clipping, saving as a PEFT folder
base        the frozen model with all of that in place: flat batch in, NLL of each response token out
capacity    how much of that fits on the device
lane        one trial on its way through the engine
engine      slots: lanes enter, share passes, leave
"""
