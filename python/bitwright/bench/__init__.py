"""`bitwright bench`: what this machine can do, what our hot ops make of it, and what others do.

    peaks      multiply-adds in registers and reading, at each thread count: what 100 % is
    rivals     torch, OpenBLAS and Eigen, each where it is installed
    contests   one op, its work, and who does it: ours and the rivals, on the same arrays
    measure    runs them: the minimum over repeats, contenders in turn (A B A B), so that a drift of
               the machine's clock hits all alike
    models     `bitwright bench DIR`: a quantized model beside its original, in tokens a second
    command    the command line

Work is counted as the op needs it (a Gram matrix: t k^2, half of the full product), also for a
rival that does more. The run says so where a rival is missing or is not float32.
"""
