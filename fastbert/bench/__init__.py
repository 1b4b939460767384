"""The ops and a training step, judged and timed beside others' on the machine at hand: what `fastbert bench` runs.

    timing, gpu_timing      variants in turn; a GPU's by CUDA graphs
    machine, rates          where a result comes from, and what that machine can do at most
    problem, problems, products     an op on inputs, its variants, bytes and operations; what is right
    tables, step            optimizers of embedding tables; a training step
    peers                   other libraries
    plan, measure           which shapes; from a problem to rows
    results, report         the table and what changed; the page
    settings, run           all of it in order

Nothing is imported here: the scripts in benchmarks/ take single parts, some of which need torch alone.
"""
