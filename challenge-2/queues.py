class Message:
    def __init__(self,*a,**k): pass
class MessageQueue:
    def __init__(self,*a,**k): pass
class QueueConnection:
    def __init__(self,*a,**k): pass
