from sqlalchemy import text

SELECT = "SELECT * FROM events WHERE "


def refused(name, session):
    # ruleid: formatted-sql
    session.execute(text(f"SELECT * FROM events WHERE name = '{name}'"))
    # ruleid: formatted-sql
    session.execute(text("SELECT * FROM events WHERE name = '%s'" % name))
    # ruleid: formatted-sql
    session.execute(text("SELECT * FROM events WHERE name = '{}'".format(name)))
    # ruleid: formatted-sql
    session.execute(text(SELECT + name))


def allowed(name, session):
    # ok: formatted-sql
    session.execute(text("SELECT * FROM events WHERE name = :name"), {"name": name})
    # ok: formatted-sql
    session.execute(text(SELECT))
    # ok: formatted-sql
    print(f"text({name})")
