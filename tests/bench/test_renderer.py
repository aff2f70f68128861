"How fast scenes are drawn, seeds to pixels, at two threads; the floor is 1.5 times what the course's prototype reached."
import time
import pytest, torch
from latentcourse.toybox import draw, scenes

def rate(size, batch, repeats=9):
    draw(scenes(torch.arange(batch)), size)                               # textures are made once
    times = []
    for k in range(1, repeats + 1):
        seeds = torch.arange(k * batch, (k + 1) * batch)
        start = time.perf_counter(); draw(scenes(seeds), size); times.append(time.perf_counter() - start)
    return batch / sorted(times)[len(times) // 2]

@pytest.mark.parametrize('size, batch, floor', [(32, 512, 9000), (64, 512, 3405), (64, 64, None), (128, 128, 600), (512, 8, None)])
def test_pictures_a_second(size, batch, floor, figure):
    torch.set_num_threads(min(2, torch.get_num_threads()))
    figure(f'renderer, {size} x {size}, batches of {batch}', rate(size, batch), 'pictures/s', floor)
