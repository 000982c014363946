"""Fields that LLaMA-Factory and TRL have from Transformers' TrainingArguments, with its defaults."""

from loratune.delivery.recipes.recipe import ForeignRecipe


def read_training(recipe: ForeignRecipe) -> None:
    recipe.put("training", "epochs", recipe.number("num_train_epochs", default=3.0))
    if recipe.given.get("max_steps", -1) in (-1, 0):
        recipe.take("max_steps")
    recipe.lose("max_steps", "a study's length is training.epochs")
    micro = recipe.number("per_device_train_batch_size", default=8, kind=int)
    recipe.batch(micro, recipe.number("gradient_accumulation_steps", default=1, kind=int))
    recipe.scheduler("lr_scheduler_type", default="linear")
    recipe.warmup()
    recipe.optimizer("optim")
    recipe.precision()
    recipe.code_of_the_model()
    recipe.study["seed"] = recipe.number("seed", default=42, kind=int)
