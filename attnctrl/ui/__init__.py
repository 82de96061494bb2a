"""The web page, made from the registry. Only app.py, the tabs, forms, canvas and api need Gradio (extra `ui`)."""
