class Cache:
    def __init__(self,*a,**k): pass
class CacheConnection:
    def __init__(self,*a,**k): pass
