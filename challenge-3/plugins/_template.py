"""A plugin to copy: `cp plugins/_template.py plugins/my_plugin.py`, then `python check.py …`.

Files that begin with an underscore are not loaded. See `utils` for the other bases: Validator,
Transformer, PluginBase (lenient), APIContractBase (strict), PydanticPlugin (with settings).
"""

from pydantic import BaseModel, ConfigDict, Field

from utils import Processor


class Order(BaseModel):
    """What goes in: its fields stand in /docs."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"quantity": 3, "price": 4.5}]})

    quantity: int = Field(ge=1)
    price: float = Field(ge=0, allow_inf_nan=False)


class Total(BaseModel):
    """What comes out; checked before it is passed on."""

    total: float = Field(allow_inf_nan=False)


class MyPlugin(Processor[Order, Total]):
    """One line that says what it does."""

    version = "1.0.0"
    description = "One line that says what it does."
    author = "Your name"

    def process(self, data: Order) -> Total:
        """One instance serves all calls, several at a time: keep no state between them."""
        return Total(total=round(data.quantity * data.price, 2))
