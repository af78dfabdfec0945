"""Holdfast for Lightning: `fit` goes on at the batch where it was interrupted.

    run = holdfast.Run("runs/fit", every="10min", keep="last=3 best=1:val_loss")
    trainer = Trainer(max_epochs=20, callbacks=[holdfast.lightning.Callback(run)])
    trainer.fit(model, train_loader, val_loader)

The same command goes on, inside an epoch too, without `ckpt_path`. `lightning` and
`pytorch_lightning` are both served.

**How.** Lightning's own way back into an epoch tells its loops to leave out what was done. This
one lets them start as ever, and where they ask for the epoch's next batch everything that they
know is made what it was at the save: they stand at the same line of code, so what follows is the
same. The data come from Holdfast's feeds, which know their place.
"""

from holdfast.lightning.callback import Callback

__all__ = ["Callback"]
