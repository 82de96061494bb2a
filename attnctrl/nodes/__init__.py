"""ComfyUI nodes, made from the registry.

Nothing here imports ComfyUI; only the pack does, which `attnctrl export-comfy` writes. Native nodes run controls inside
ComfyUI's own models (`native`, `runs`, `hook`, `models`), pipeline nodes wrap attnctrl's pipelines (`pipeline`,
`tasks`, `readouts`). `catalog` lists all of them.
"""
