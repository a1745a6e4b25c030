"""PyTorch Geometric: a graph network on Zachary's karate club."""

import torch
from torch.nn import functional as F
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GAT

from lwas_fast import AdamWLW

torch.manual_seed(0)
graph = KarateClub()[0]
model = GAT(graph.num_features, 16, num_layers=2, out_channels=4, dropout=0.2)
optimizer = AdamWLW(model)

for _ in range(100):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(graph.x, graph.edge_index)[graph.train_mask], graph.y[graph.train_mask])
    loss.backward()
    optimizer.step()

model.eval()
with torch.no_grad():
    out = model(graph.x, graph.edge_index)
right = (out.argmax(1) == graph.y).float().mean().item()
print(f"loss {F.cross_entropy(out[graph.train_mask], graph.y[graph.train_mask]).item():.4f}, all nodes {right:.2f}")
