"""The gate and the window on numbers: what Prune-OPD does, without a model.

.venv/bin/python examples/gate_on_numbers.py
"""

import torch

from prune_opd.config import GateConfig, HorizonConfig
from prune_opd.method.gate import apply_gate, overlap_ratio
from prune_opd.method.horizon import make_controller

# One response of six tokens. Of each token: the four best ids of the student, and of the teacher.
student_ids = torch.tensor([[[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4], [9, 8, 7, 6], [1, 2, 3, 4]]])
teacher_ids = torch.tensor([[[4, 3, 2, 1], [1, 2, 3, 9], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [4, 2, 3, 1]]])

overlap = overlap_ratio(student_ids, teacher_ids)
print("overlap    ", overlap.tolist())  # 1, 3 of 4, none, all, none, all

# An event is an overlap below the threshold. Each costs half of the reliability, and it never comes back.
gate = GateConfig(k=4, threshold=0.7, w_drop=0.5, w_base=0.5)
events = overlap < gate.threshold
result = apply_gate(events, torch.ones_like(events), gate)
print("events     ", events.int().tolist())
print("reliability", result.reliability_BT.tolist())
print("weight     ", result.weight_BT.tolist())  # reliability + w_base; w_base=0 would really prune the tail
print("reliable   ", result.reliable_length_B.tolist(), "tokens, before reliability is 0")

# The window: it grows while at least a tenth of the responses are reliable up to its end, and shrinks after misses.
controller = make_controller(
    HorizonConfig(strategy="prune", max_len=256, min_len=16, init_len=64, step=32, margin=16, patience=2, hit_ratio=0.1)
)
print("window     ", [controller.horizon], end="")
for reliable in (60, 90, 20, 20, 20, 20):  # of all responses of a batch
    lengths = torch.full((8,), controller.horizon)
    controller.update(
        torch.full((8,), reliable).clamp(max=controller.horizon), lengths, torch.zeros(8, dtype=torch.bool)
    )
    print(f" → {controller.horizon}", end="")
print()
