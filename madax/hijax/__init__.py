from madax.hijax._trees import lift, lower, optimizer, put
__all__ = ["lift", "lower", "optimizer", "put"]
