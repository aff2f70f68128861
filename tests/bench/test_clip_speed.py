"A training step of CLIP ViT-B-32 against open_clip's: the same weights, pictures, captions and optimiser."
import os
import pytest, torch
from latentcourse.clip import from_open_clip
from latentcourse.contrastive import clip_losses

PAIRS, BATCH = int(os.environ.get('LATENTCOURSE_BENCH_PAIRS', 11)), 4

def test_training_step_of_clip_vit_b_32(race):
    open_clip = pytest.importorskip('open_clip')
    torch.manual_seed(0)
    theirs = open_clip.create_model('ViT-B-32', pretrained=None).train()
    ours, their_loss = from_open_clip(theirs), open_clip.ClipLoss()
    x, ids = torch.randn(BATCH, 3, 224, 224), open_clip.get_tokenizer('ViT-B-32')(['a red ball', 'a photo of a teddy bear reading a book', 'a duck on the beach', 'two mugs'])
    lengths = ids.argmax(1) + 1

    def step(model, forward):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-6)
        def once():
            opt.zero_grad(); loss = forward(); loss.backward(); opt.step()
            return loss.item()
        return once

    race(f'CLIP ViT-B-32 training step, {BATCH} pairs', 'open_clip', step(ours, lambda: clip_losses(*ours(x, ids, lengths), ours.log_scale).mean()), step(theirs, lambda: their_loss(*theirs(x, ids))), PAIRS)
