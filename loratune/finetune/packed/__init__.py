"""The packed engine: many adapters of different hyperparameters trained together on one frozen base.

layout      token sequences of several adapters laid end to end: a flat batch, no padding
attention   each sequence sees itself only, in a flat batch
delta       the adapters' part of a linear layer, forward and backward, each adapter on its own rows
products    the matrix products of that, by one of three backends
head        loss at response positions through the frozen output head, a chunk of logits at a time
adapter     one adapter: flat storage, AdamW, clipping, saving as a PEFT folder
base        the frozen model with all of that in place: flat batch in, NLL of each response token out
loading_check  whether a model bears it
capacity    how much of that fits on the device
norm, rotary, mlp  parts of the model that take fewer steps over memory
slot        one trial on its way through the engine
steps       a pass and the optimiser steps of several slots
engine      segments enter slots, share passes, leave
"""
