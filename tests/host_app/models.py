"""The tables of an application that uses sqlsessions and has an Alembic history of its own."""

import os

from sqlalchemy import ForeignKey, Index, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlsessions.schema import sessions_table


class Base(DeclarativeBase):
    """The application's metadata."""

    metadata = MetaData()


class User(Base):
    """Somebody who logs in."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)


class Order(Base):
    """What somebody bought."""

    __tablename__ = "orders"
    __table_args__ = (Index("orders_user_id", "user_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))


# Some applications have the session table in their metadata too, to join with it.
if "HOST_JOINS" in os.environ:
    sessions_table(Base.metadata)
