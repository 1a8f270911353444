import structlog

log = structlog.get_logger()


class Server:
    def refused(self, secret, token, webhook, request, settings):
        # ruleid: secret-in-log
        log.info("created", secret=secret)
        # ruleid: secret-in-log
        log.warning("refused", bearer=f"Bearer {token}")
        # ruleid: secret-in-log
        self._log.error("lost", row=webhook.secret_ciphertext)
        # ruleid: secret-in-log
        log.debug("sent %s", webhook.payload)
        # ruleid: secret-in-log
        log.info("connected", to=settings.database_url.get_secret_value())
        # ruleid: secret-in-log
        log.info("received", headers=dict(request.headers))

    def allowed(self, secret, webhook, error, print):
        # ok: secret-in-log
        log.info("created", webhook_id=webhook.id)
        # ok: secret-in-log
        log.info("tokens_refused", count=3)
        # ok: secret-in-log
        log.warning("secret", error=repr(error))
        # ok: secret-in-log
        print(secret)
