"""Where a GPU's time goes: the time of each kernel, and the bytes that each of ours must move."""

import torch

from tests.bench import cache_bytes

def kernel_times(run):
    """{kernel: (milliseconds, calls)} of a second call of run, the longest first; {} without a GPU."""
    run()
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    times = {e.key: (e.self_device_time_total / 1e3, e.count) for e in events}  # microseconds
    return dict(sorted(((k, v) for k, v in times.items() if v[0] > 0), key=lambda row: -row[1][0]))

def kernel_bytes(t, h, p, n, l, g=1):
    """{pass: {kernel: bytes of all its calls}} of the scan, each operand moved once; t tokens, chunks of l.

        x  2 t h p    x, y, or a gradient of them    s   2 (t / l) h p n   the states before the chunks
        bc 2 t n g    B, C, or a gradient of them    cb  2 t l g           C B^T: of its 128 x 128 tiles,
        f  4 t h      a float32 per token and head                         those on and below the diagonal

    f counts where there is little else. Decays: the step; dt, a pair for c, and two per boundary, one every
    64 tokens. ddt: sums over rows and columns of the triangle's 64 x 64 tiles, half of l / 64 + 1 each; F and
    E of n / 128 tiles; diagonal, dt, ddt.
    """
    tiles = max(1, l // 128)
    edges = max(1, l // 64)
    x = 2 * t * h * p
    s = 2 * t * h * p * n // l
    bc = 2 * t * n * g
    f = 4 * t * h
    cb = 2 * t * l * g * (tiles + 1) // (2 * tiles)
    both = {"_decays_kernel": f * (4 + 2 * (edges + 1)), "_scan_kernel": 2 * x + s + bc + cb}
    forward = {"_cb_kernel": 2 * bc + cb, "_states_kernel": x + bc + s}
    backward = {"_states_kernel": x + bc + 2 * s,
                "_dcb_kernel": 2 * (x + cb),  # two calls: the diagonal, and what lies below
                "_dbc_kernel": 2 * (x + s + cb + 3 * bc),  # two calls: dC, dB
                "_ddt_kernel": f * (edges + 1 + 2 * max(1, n // 128) + 3)}
    return {"forward": both | forward, "backward": both | backward}

def step_kernel_bytes(c, slots, length, dtype):
    """{kernel: bytes} of a decoding step, all layers: keys and values are read, states read and written."""
    size = cache_bytes(c, slots, length, dtype)
    return {"_attend_kernel": size["kv"],
            "_conv_step_kernel": 2 * size["conv"],
            "_step_kernel": 2 * size["ssm"]}
