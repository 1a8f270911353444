import asyncio


async def refused(work, loop):
    # ruleid: dangling-task
    asyncio.create_task(work())
    # ruleid: dangling-task
    asyncio.ensure_future(work())
    # ruleid: dangling-task
    loop.create_task(work())
    if work:
        # ruleid: dangling-task
        asyncio.get_running_loop().create_task(work(), name="lost")


async def allowed(self, work, group, queue):
    # ok: dangling-task
    self._task = asyncio.create_task(work())
    # ok: dangling-task
    tasks = [asyncio.create_task(work()) for _ in range(3)]
    # ok: dangling-task
    await asyncio.shield(asyncio.create_task(work()))
    # ok: dangling-task
    queue.put_nowait(asyncio.create_task(work()))
    # ok: dangling-task
    group.create_task(work())
    # ok: dangling-task
    return asyncio.create_task(work()), tasks
