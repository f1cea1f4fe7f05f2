"""The guards of the record and of the doors: audit, repeated calls, devices, operators, tokens."""

from __future__ import annotations

from typing import Final

from tests.mutation.guards import of

_AUDIT: Final = ("tests/server/test_audit.py", "tests/rollouts/test_witness.py")
_CALLS: Final = ("tests/server/test_requests.py", "tests/rollouts/test_controller_restart.py")
_DEVICES: Final = ("tests/server/test_access.py", "tests/server/test_authority.py", "tests/server/test_requests.py")
_PEOPLE: Final = ("tests/server/test_access_operators.py", "tests/server/test_admin.py")
_TOKENS: Final = ("tests/server/test_tokens.py", "tests/server/test_tokens_live.py")

GUARDS: Final = (
    # What happened, and who may.
    *of(
        "server/umbel_server/audit.py", _AUDIT,
        ("a deleted row", "if row.sequence != length + 1:", "if False:"),
        ("the row before", "row.previous != previous or ", ""),
        ("an edited row", "row.previous != previous or row.hash != row.expected_hash()", "row.previous != previous"),
    ),
    *of(
        "server/umbel_server/checkpoints.py", _AUDIT,
        ("a log that was cut off", "if seen and len(leaves) < seen[-1].size:", "if False:"),
        ("a log that was written anew", "if tree.root != checkpoint.root:", "if False:"),
        ("a note's signature", '    verify_signature(public_key, signed[4:], checkpoint.text.encode(), "a checkpoint")\n', ""),
        ("a note's log and key", 'if (origin, name, dash) != (ORIGIN, ORIGIN, "\\N{EM DASH}") or signed[:4] != _key_hash(public_key):', "if False:"),
        ("a note that was cut off is read over", "written[: _whole(written)]", "written"),
        ("a note that was cut off goes", "file.truncate(_whole(self._file.read_bytes()))", "pass"),
        ("a key that was mistyped", " or _key_hash(key[1:]).hex() != found:", ":"),
        ("leaves aren't nodes", 'b"\\1" + left + right', "left + right"),
    ),
    *of(
        "server/umbel_server/port_certificate.py", ("tests/server/test_app.py",),
        ("a certificate is renewed", "if not is_recent(made_at, self._clock.now(), RENEW_AFTER):", "if False:"),
        ("one certificate for all", "if not is_recent(made_at, self._clock.now(), RENEW_AFTER):", "if True:"),
        ("a certificate of the future", "if not is_recent(made_at, self._clock.now(), RENEW_AFTER):", "if self._clock.now() - made_at >= RENEW_AFTER:"),
    ),
    *of(
        "server/umbel_server/requests.py", _CALLS,
        ("one request id, one call", "if (row.actor, row.action, row.subject, row.body or \"\") != (actor, action, subject, call.body):", "if False:"),
        ("what was asked for", '(row.actor, row.action, row.subject, row.body or "") != (actor, action, subject, call.body)', "(row.actor, row.action, row.subject) != (actor, action, subject)"),
        ("the newest revision", "    if found != call.expected_revision:", "    if False:"),
        ("a request id's form", '    fields.name(request_id, "request id")\n', ""),
        ("a request id's length", "if len(request_id) > MAX_ID_CHARS:", "if False:"),
        ("an answer that was given", "    if before is not None:\n        return before\n", ""),
    ),
    *of(
        "server/umbel_server/registry.py", _CALLS,
        ("a version that was added", "                return self.version(connection, model, int(answered))\n", "                pass\n"),
    ),
    *of(
        "server/umbel_server/access.py", _DEVICES,
        ("a device's certificate", "        if certificate is None:", "        if False:"),
        ("a revoked device", '        if self._is_revoked(peer.id):\n', "        if False:\n"),
        ("a revoked key enrols", "        if self._is_revoked(device):\n            raise EnrolmentRefused", "        if False:\n            raise EnrolmentRefused"),
        ("attestation", "        self._attestation.verify(attestation, device)\n", ""),
        ("an attestation's size", "if len(attestation) > MAX_ATTESTATION_BYTES:", "if False:"),
        ("a token's end", ", TOKENS.c.expires_at > now, unused_or_own", ", unused_or_own"),
        ("a token's single use", "TOKENS.c.expires_at > now, unused_or_own", "TOKENS.c.expires_at > now"),
        ("a guessed token", "    if claimed.rowcount != 1:\n", "    if False:\n"),
        ("a key's population", "if known is not None and known != population:", "if False:"),
        ("renewal of another key", "if id_of_key(key_of_request(request)) != device.id:", "if False:"),
        ("tokens aren't kept", 'return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()', "return token"),
        ("how many tokens", "if not 1 <= count <= TOKENS_AT_ONCE:", "if False:"),
        ("how long tokens live", "if not 0 < seconds <= MAX_TOKEN_SECONDS:", "if False:"),
        ("denied by another process", "        if not is_recent(self._looked_at, self._clock.now(), self._look_seconds):\n", "        if False:\n"),
        ("nothing convinces by default", '        del evidence\n        raise EnrolmentRefused(f"device {device} can\'t enrol', '        return\n        raise EnrolmentRefused(f"device {device} can\'t enrol'),
    ),
    *of(
        "server/umbel_server/authority.py", _DEVICES,
        ("a certificate's kind", "if peer.kind is not kind:", "if False:"),
        ("a certificate's time", "if not peer.not_before <= now < peer.not_after:", "if False:"),
        ("a certificate's issuer", "        certificate.verify_directly_issued_by(authority)\n", ""),
        ("a certificate's own id", ' or matched["id"] != identity', ""),
        ("a certificate's purpose", " or list(purposes) != [ExtendedKeyUsageOID.CLIENT_AUTH]", ""),
        ("proof of a key", "    if not proven:\n", "    if False:\n"),
        ("kinds of keys", "if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):", "if False:"),
    ),
    *of(
        "server/umbel_server/roles.py", _PEOPLE,
        ("a method without a row", "    if allowed is None:\n", "    if False:\n"),
        ("a role's reach", "    if role not in allowed:\n", "    if False:\n"),
        ("absent reaches nowhere", "return role in ALLOWED.get(method, ())", "return role in ALLOWED.get(method, tuple(Role))"),
    ),
    *of(
        "server/umbel_server/operators.py", _PEOPLE,
        ("an operator's certificate", "        if certificate is None:", "        if False:"),
        ("an operator's role", "        require_role(method, operator.role)\n", ""),
        ("an unknown or revoked operator", "if operator is None or operator.revoked_at is not None:", "if operator is None:"),
        ("the first admin only", "        if not self._known:\n", "        if True:\n"),
        ("the last admin", "        if admins == [found]:\n", "        if False:\n"),
        ("a name is given once", "if any(other.name == called for other in self._known.values()):", "if False:"),
        ("a key keeps its role", "elif (known.name, known.role, known.revoked_at) != (called, role, None):", "elif False:"),
    ),
    *of(
        "server/umbel_server/operators.py", _TOKENS,
        ("a token that ends during a call", "elif self._clock.now() >= operator.until:", "elif False:"),
    ),
    *of(
        "server/umbel_server/tokens.py", _TOKENS,
        ("a token's length", "if not 0 < len(token) <= MAX_TOKEN_CHARS:", "if False:"),
        ("a token's algorithm", 'if header.get("alg") not in rules.algorithms or header["alg"] not in ASYMMETRIC:', 'if header["alg"] not in ASYMMETRIC:'),
        ("shared secrets", ' or header["alg"] not in ASYMMETRIC:', ":"),
        ("a token's extensions", 'if "crit" in header:', "if False:"),
        ("a token's key", "if not isinstance(kid, str) or not kid:", "if False:"),
        ("a token's issuer", 'if claims.get("iss") != rules.issuer:', "if False:"),
        ("a token's audience", 'if rules.audience not in _texts(claims.get("aud")):', "if False:"),
        ("a token's tenant", "        if claims.get(claim) != value:", "        if False:"),
        ("a token's subject", "if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT_CHARS or not _plain(subject):", "if False:"),
        ("a token's groups", "    if not roles:\n", "    if False:\n"),
        ("a token's signature", '    "verify_signature": True,', '    "verify_signature": False,'),
        ("an RSA key's length", 'if key["kty"] == "RSA" and public.key.key_size < LEAST_RSA_BITS:', "if False:"),
        ("a key's family", 'key.get("kty") != ASYMMETRIC[algorithm] or ', ""),
        ("a key's algorithm", ' or key.get("alg", algorithm) != algorithm:', ":"),
        ("a key's use", 'if uses != "sig" or not isinstance(operations, list) or "verify" not in operations:', "if False:"),
        ("a token's expiry", 'if now >= times["exp"] + SKEW_SECONDS:', "if False:"),
        ("a token before its time", 'if now < max(times["iat"], times.get("nbf", 0.0)) - SKEW_SECONDS:', "if False:"),
        ("a token's age", 'if now - times["iat"] > rules.longest_seconds:', "if False:"),
        ("a token that says its times", 'if not {"exp", "iat"} <= times.keys() or any(not _is_time(value) for value in times.values()):', "if False:"),
        ("algorithms of settings", "    if wrong or not found:\n", "    if False:\n"),
    ),
    *of(
        "server/umbel_server/provider.py", _TOKENS,
        ("old keys", "if not is_recent(known.at, self._clock.now(), KEPT_SECONDS):", "if False:"),
        ("a withdrawn key", " or not is_recent(known.at, now, FRESH_SECONDS)", ""),
        ("asking again and again", "return stale and not is_recent(known.tried_at, now, PAUSE_SECONDS)", "return stale"),
        ("one look at a time", "async with self._looking:", "if True:"),
        ("who comes while there is a look", "            known.tried_at = begun\n", "            pass\n"),
        ("another issuer's document", 'if discovered.get("issuer") != self._issuer:', "if False:"),
        ("how many keys", " or len(entries) > MAX_KEYS:", ":"),
        ("two keys of one id", "    if len(found) != len(named):", "    if False:"),
        ("keys over https", 'not isinstance(address, str) or not address.startswith("https://")', "not isinstance(address, str)"),
        ("a slow provider", "await asyncio.wait_for(asyncio.to_thread(_document, exchange, parts), self._seconds)", "await asyncio.to_thread(_document, exchange, parts)"),
        ("an endless document", "if len(document) > MAX_BYTES:", "if False:"),
        ("redirects", "    if answer.status != http.HTTPStatus.OK:\n", "    if False:\n"),
    ),
)  # fmt: skip
