class Database:
    def __init__(self,*a,**k): pass
class DatabaseConnection:
    def __init__(self,*a,**k): pass
class PipelineDatabase:
    def __init__(self,*a,**k): pass
class Row:
    def __init__(self,*a,**k): pass
