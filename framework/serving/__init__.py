"""A compiled program behind HTTP: typed endpoints, OpenAI's protocol, metrics and a page to try it.

    preceptor serve runs/1/program

or, as an ASGI application for a server of one's own:

    from preceptor.serving.app import application
    from preceptor.serving.service import Service, Source

    app = application(Service(Source("runs/1/program", lm=lambda name: dspy.LM(name))))
"""
