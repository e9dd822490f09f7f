"Train text-embedding models and find out whether a change really helped."
__version__ = "0.1.0"


def __getattr__(name):
    "Offer `embedlab.runs` and `embedlab.Record` without importing anything heavy up front."
    if name in ("runs", "Record"):
        from . import records
        return getattr(records, name)
    raise AttributeError(f"module 'embedlab' has no attribute '{name}'")
