"""What leaves a study: the chosen configuration, its adapter or a merged model, with a card, checked before it is handed over.

hand_over   study -> best.yaml and adapter/, an ordinary PEFT folder with a model card
export      study -> a copy of any trial's adapter, or the model merged with it
"""

from loratune.delivery.exporting import export
from loratune.delivery.handover import hand_over

__all__ = ["export", "hand_over"]
