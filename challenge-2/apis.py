class API:
    def __init__(self,*a,**k): pass
class APIConnection:
    def __init__(self,*a,**k): pass
