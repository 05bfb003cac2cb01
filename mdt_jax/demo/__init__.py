"""The demo: a page on which a model is tried, `python -m mdt_jax.demo`.

`requests` reads what a browser, or anyone who calls the server without one, asks for. `engine`
makes the pictures, `line` lets one request after the other use the devices, `page` shows them by
Gradio, and `guard` stands before it. Only `page` and `guard` need the extra `demo`.
"""
