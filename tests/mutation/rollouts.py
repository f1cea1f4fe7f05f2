"""The guards of rollouts on the coordinator: stages, gates, waves, offers, steering, the release listing."""

from __future__ import annotations

from typing import Final

from tests.mutation.guards import of

_LISTING: Final = ("tests/server/test_release_attacks.py", "tests/server/test_release_keys.py")
_MACHINE: Final = (
    "tests/server/test_rollout_machine.py",
    "--deselect=tests/server/test_rollout_machine.py::TestAnyoneDoesAnything",
)
_GATES: Final = ("tests/server/test_gates.py",)
_STEERING: Final = (
    "tests/rollouts/test_offers.py",
    "tests/rollouts/test_experiments.py",
    "tests/rollouts/test_controller_restart.py",
    "tests/rollouts/test_rollout_end_to_end.py",
)
_ENDS: Final = ("tests/rollouts/test_ends.py",)
_POPULATIONS: Final = ("tests/rollouts/test_populations.py",)
_WEEKS: Final = ("tests/rollouts/test_weeks.py",)
_CUTS: Final = ("tests/rollouts/test_listing_restart.py",)
_CONTROLLERS: Final = ("tests/rollouts/test_controller_crashes.py",)
_DESK: Final = (
    "tests/rollouts/test_offers.py",
    "tests/rollouts/test_controller_restart.py",
    "tests/rollouts/test_quantised_releases.py",
    "tests/server/test_registry.py",
    "tests/server/test_cli_releases.py",
)

GUARDS: Final = (
    # The state machine.
    *of(
        "server/umbel_server/rollout.py", _MACHINE,
        ("stages", "if rollout.stage not in ALLOWED[action]:", "if False:"),
        ("a second person approves", "    _require_second_person(rollout, actor)\n    if subject", "    if subject"),
        ("the last editor is no second person", "in (rollout.author, rollout.last_editor)", "in (rollout.author,)"),
        ("the author is no second person", "in (rollout.author, rollout.last_editor)", "in (rollout.last_editor,)"),
        ("what is approved", "if subject != rollout.spec.subject:", "if False:"),
        ("an edit voids the approval", 'approved_by="", approved_subject="", reason="edited"', 'reason="edited"'),
        ("an edit has to be submitted", "rollout, Stage.DRAFT, spec=spec", "rollout, rollout.stage, spec=spec"),
        ("approved as it stands", "if rollout.approved_subject != rollout.spec.subject:", "if False:"),
        ("a scheduled start", "if now < rollout.spec.start_at:", "if False:"),
        ("a second person promotes", '    _require("promote", rollout)\n    _require_second_person(rollout, actor)\n', '    _require("promote", rollout)\n'),
        ("a second person resumes what a gate stopped", "    if rollout.stopped_by_gate:\n        _require_second_person(rollout, actor)\n", ""),
        ("a wave that a person confirms", "if rollout.spec.arms or (rollout.share and rollout.share.promotion is Promotion.MANUAL):", "if rollout.spec.arms:"),
        ("an experiment ends by a person", "if rollout.spec.arms or (", "if ("),
        ("a failed gate goes back", "if rollout.spec.on_failure is OnFailure.ROLL_BACK:", "if False:"),
        ("a failed gate pauses by policy", "if rollout.spec.on_failure is OnFailure.ROLL_BACK:", "if True:"),
        ("a gate that knows nothing pauses", "        case Decision.INCONCLUSIVE:\n            return _next(rollout, Stage.PAUSED, reason", "        case Decision.INCONCLUSIVE:\n            return _next(rollout, Stage.RUNNING, reason"),
        ("a gate's stop is remembered", "return _next(rollout, Stage.PAUSED, reason=reason, stopped_by_gate=True)", "return _next(rollout, Stage.PAUSED, reason=reason)"),
        ("the revision seen", "if expected not in (-1, rollout.revision):", "if False:"),
        ("wave after wave", "wave=rollout.wave + 1, wave_opened_at=now", "wave=rollout.wave + 1"),
    ),
    *of(
        "server/umbel_server/rollout_spec.py", _MACHINE,
        ("a wave's share", "self.lab != (self.percent == 0) or not 0 <= self.percent <= 100", "False"),
        ("a wave's times", "if not 0 <= self.soak_seconds <= self.deadline_seconds < float(\"inf\"):", "if False:"),
        ("a wave at all", "if not self.waves:", "if False:"),
        ("waves that rise", "sorted(set(shares)) != shares or ", ""),
        ("somebody beyond the lab", " or shares[-1] == 0:", ":"),
        ("a lab", "if any(wave.lab for wave in self.waves) and not self.lab:", "if False:"),
        ("releases that rise", "self.release <= self.from_release or ", ""),
        ("a way back that is higher", "self.revert_release and self.revert_release <= self.release", "False"),
        ("who is held back", "if not 0 <= self.hold_back_percent < 100:", "if False:"),
        ("an experiment's arms", "len(self.arms) < 2 or ", ""),
        ("an experiment's weights", " or not all(0 < arm.weight < float(\"inf\") for arm in self.arms)", ""),
    ),
    *of(
        "server/umbel_server/gates.py", _GATES,
        ("the ceiling's devices", "failed >= policy.ceiling_devices and ", ""),
        ("the ceiling's share", " and failed > policy.ceiling_share * offered", ""),
        ("at the ceiling isn't above it", "failed > policy.ceiling_share * offered", "failed >= policy.ceiling_share * offered"),
        ("rejections", "return Finding(\"rejections\", Decision.FAIL if enough else Decision.CONTINUE, words)", "return Finding(\"rejections\", Decision.PASS, words)"),
        ("a failure is no rejection", "exposure.answered and not exposure.failed]", "exposure.answered]"),
        ("evidence stops", "Decision.FAIL if wealth >= 1 / alpha and several", "Decision.FAIL if False and several"),
        ("all tests together", "alpha = policy.alpha / TESTS", "alpha = 0.4"),
        ("a soak time", "if look.soaked and decisions == {Decision.PASS}:", "if decisions <= {Decision.PASS, Decision.CONTINUE}:"),
        ("a deadline", "Decision.INCONCLUSIVE if look.last else", "Decision.CONTINUE if look.last else"),
        ("enough answers", "enough = look.soaked and answered >= needed", "enough = look.soaked"),
        ("devices that haven't come yet", "max(min(policy.least_answers, look.members), ", "max(0, "),
        ("a share of answers", "math.ceil(policy.least_answer_share * offered)", "0"),
        ("drift before the soak time", "enough = look.soaked and len(theirs)", "enough = len(theirs)"),
        ("a control of enough devices", "len(theirs) >= LEAST_CONTROL * len(ours)", "True"),
        ("the control's failures", "return min(beside, above_evidence(ours, len(canaries), expected))", "return above_evidence(ours, len(canaries), expected)"),
        ("the usual failures", "return min(beside, above_evidence(ours, len(canaries), expected))", "return beside"),
        ("evidence for a margin", "Decision.PASS if wealth >= 20 else Decision.CONTINUE", "Decision.PASS"),
        ("absurd measurements", "max(RATIO_BOUNDS[0], min(RATIO_BOUNDS[1], math.log2(ratio)))", "math.log2(ratio)"),
    ),
    *of(
        "server/umbel_server/evidence.py", _GATES,
        ("bounded bets", "(min(high, max(low, x)) - limit)", "(x - limit)"),
    ),
    *of(
        "server/umbel_server/waves.py", _MACHINE,
        ("a group", "    if spec.only and device not in spec.only:\n        return None\n", ""),
        ("who is held back stays out", "device) < spec.hold_back_percent * 100", "device) < 0"),
        ("waves that aren't open", "wave is not None and wave <= rollout.wave", "wave is not None"),
        ("each rollout its own places", "place = bucket(rollout.salt, device)", 'place = bucket("", device)'),
        ("a lab alone", "if device in spec.lab if wave.lab else", "if True if wave.lab else"),
    ),
    *of(
        "server/umbel_server/experiments.py", ("tests/rollouts/test_experiments.py",),
        ("a share that chance didn't make", "Decision.INCONCLUSIVE if wealth * SRM_ALPHA >= 1 else", "Decision.PASS if wealth * SRM_ALPHA >= 1 else"),
        ("one arm that fails", "    if Decision.FAIL in decisions:\n", "    if decisions == {Decision.FAIL}:\n"),
        ("an arm that can't tell", "worst = next(it for it in (Decision.INCONCLUSIVE, Decision.CONTINUE, Decision.PASS) if it in decisions)", "worst = next(it for it in (Decision.PASS, Decision.CONTINUE, Decision.INCONCLUSIVE) if it in decisions)"),
        ("who got no arm is control", "[*canaries[arm.release], *control]", "[*canaries[arm.release]]"),
        ("all arms together", "replace(policy, alpha=policy.alpha / len(arms))", "replace(policy, alpha=0.4)"),
    ),
    *of(
        "server/umbel_server/metadata_files.py", _LISTING,
        ("only metadata are handed out", "not _FILE.fullmatch(name) or ", ""),
    ),
    *of(
        "server/umbel_server/metadata_files.py", _WEEKS,
        ("files that nobody asks for", "[:-KEPT_FILES]", "[:0]"),
    ),
    *of(
        "server/umbel_server/drafts.py", _WEEKS,
        ("numbered by the seconds", "0 if rule_of(role).offline else int(now)", "0"),
    ),
    *of(
        "server/umbel_server/repository.py", _WEEKS,
        ("what is passed", "for number in passed:", "for number in ():"),
    ),
    *of(
        "server/umbel_server/repository.py", _CUTS,
        ("a key that was replaced signs anew", "metadata.signatures.keys().isdisjoint(signers)", "False"),
    ),
    *of(
        "server/umbel_server/releases.py", _CUTS,
        ("keys that are missing are made", "self._keys.complete(role)]", "(self._keys.signers(role) or self._keys.add(role))]"),
    ),
    *of(
        "server/umbel_server/key_audit.py", ("tests/rollouts/test_key_audit.py",),
        ("keys are written down once", "if version > known:", "if True:"),
        ("keys that change later", "if changed == self._looked_at:", "if self._looked_at >= 0:"),
    ),
    *of(
        "server/umbel_server/files.py", _CUTS,
        ("whole or not at all", "aside = aside_of(path)", "aside = path"),
    ),
    *of(
        "server/umbel_server/renewal.py", ("tests/rollouts/test_listing_restart.py",),
        ("what devices don't believe is due", " or not repository.is_believed(it.role)", ""),
    ),
    *of(
        "server/umbel_server/mirroring.py", ("tests/rollouts/test_mirror.py",),
        ("what a killed mirror left goes", "        drop_left(place, listing / TIMESTAMP)\n", ""),
    ),
    *of(
        "client/umbel_client/predictor.py", ("tests/rollouts/test_full_disk.py",),
        ("no try that isn't counted", "                self._load(slots.revert())\n", "                self._load(slots)\n"),
    ),
    *of(
        "server/umbel_server/releases.py", _WEEKS,
        ("another channel's head", "numbers = sorted(it.number for it in listed.values() if it.channel == channel)", "numbers = sorted(it.number for it in listed.values())"),
        ("what was dropped doesn't wait", "LISTED.c.number > max(self.listed(it), default=0)", "LISTED.c.number.not_in(self.listed(it))"),
    ),
    *of(
        "server/umbel_server/renewal.py", _WEEKS,
        ("signed anew before its key goes", "signed = signs_anew and _sign_anew(repository, keys, role, key_id, now)", "signed = False"),
        ("signed anew by the new key", "if signs_anew and not signed:", "if False:"),
        ("a key that was replaced doesn't lie about", "    keys.forget(key_id)\n", ""),
        ("not by the key that goes", "it.held_here} - {without}", "it.held_here}"),
    ),
    *of(
        "server/umbel_server/repository.py", _WEEKS,
        ("a model without a listing yet", "for model in self.models() if self.has_listing(model)]", "for model in self.models()]"),
    ),
    *of(
        "client/umbel_client/adoption.py", _WEEKS,
        ("what can't be shown is no release's fault", "return await believe(self._kit, listing, signed)\n        except Unavailable:", "return await believe(self._kit, listing, signed)\n        except UmbelError:"),
    ),
    # Offers, answers, steering.
    *of(
        "server/umbel_server/offers.py", _STEERING,
        ("a hold", "        if model in self.standing.held:\n            return None\n", ""),
        ("only what is listed", "if release is None or wanted.number", "if wanted.number"),
        ("only what is newer", "or wanted.number <= check_in.release:", "or False:"),
        ("who answered isn't asked again", "if known is not None and not _may_be_asked_again(known):", "if False:"),
        ("a stopped rollout offers nothing", "if rollout.offers and takes(rollout, device):", "if rollout.stage not in GOING_BACK and takes(rollout, device):"),
        ("waves choose", "if rollout.offers and takes(rollout, device):", "if rollout.offers:"),
        ("only who has it goes back", "spec.revert_release and self._has(connection, rollout, device, check_in):", "False:"),
    ),
    *of(
        "server/umbel_server/offers.py", _ENDS,
        ("what is for everybody goes before going back", "return rollout.spec.revert_release >= head", "return True"),
        ("who is held back stays so", "if head in (spec.release, spec.revert_release) and is_held_back(rollout, device):", "if False:"),
    ),
    *of(
        "server/umbel_server/rollout.py", _ENDS,
        ("a share of a population goes on", "ended_apart = self.stage is Stage.SUCCEEDED and not", "ended_apart = False and not"),
    ),
    *of(
        "server/umbel_server/rollout_spec.py", _ENDS,
        ("waves below everybody", "self.waves[-1].percent == 100 and not self.only", "not self.only"),
        ("a group isn't everybody", "self.waves[-1].percent == 100 and not self.only", "self.waves[-1].percent == 100"),
    ),
    *of(
        "server/umbel_server/releases.py", _ENDS,
        ("what its channel has passed", "if release <= passed:", "if False:"),
        ("a way back to what was taken back", "if revert and head and not self._same_content(connection, audience.model, head, revert):", "if False:"),
    ),
    *of(
        "server/umbel_server/steering.py", _ENDS,
        ("the word of who was revoked", "if was_revoked(connection, found.approved_by):", "if False:"),
        ("a deadline of its own", "began = found.going_back_since or found.wave_opened_at", "began = found.wave_opened_at"),
        ("who moved on went back too", "for number in {found.spec.revert_release, head} if", "for number in {found.spec.revert_release} if"),
    ),
    *of(
        "server/umbel_server/executions.py", ("tests/rollouts/test_executions.py",),
        ("a foreign answer", "EXECUTIONS.c.id == told.execution, EXECUTIONS.c.device == device)", "EXECUTIONS.c.id == told.execution)"),
        ("stories", " or told.outcome not in _ANSWERS_TO.get(before, ())", ""),
        ("a rollout's own moves", "this = (EXECUTIONS.c.rollout == rollout) & EXECUTIONS.c.number.in_(numbers)", "this = EXECUTIONS.c.number.in_(numbers)"),
        ("withdrawn offers", "connection.execute(EXECUTIONS.update().where(this).values(outcome=WITHDRAWN))", "del this"),
    ),
    *of(
        "server/umbel_server/admin_rollouts.py", ("tests/server/test_requests.py",),
        ("the revision that was seen", "    if seen < 0:\n", "    if False:\n"),
    ),
    *of(
        "server/umbel_server/steering.py", _STEERING,
        ("one rollout moves a device", "            elif other.stage in rollout.GOING_FORWARD:\n", "            elif False:\n"),
        ("nobody is left", "if left and found.spec.revert_release and now < deadline:", "if False:"),
        ("the channel goes back too", "if spec.revert_release:", "if False:"),
        ("success moves the channel", "if after.stage is Stage.SUCCEEDED and spec.takes_everybody:", "if False:"),
        ("a request is carried out once", "if enter(connection, Call(request_id), actor, action, rollout_id, now) is not None:", "if enter(connection, Call(request_id), actor, action, rollout_id, now) is not None and False:"),
    ),
    *of(
        "server/umbel_server/heads.py", _POPULATIONS,
        ("what is published is every population's", "max(self.numbers.get(audience, 0), self.numbers.get(everybody, 0))", "self.numbers.get(audience, 0)"),
        ("what is published takes the place of older heads", "passed = sa.or_(mine, HEADS.c.number < number) if audience.population == EVERYBODY else mine", "passed = mine"),
        ("of everybody, the newest", "return max(self.of_channel(audience.model, audience.channel), default=0)", "return self.numbers.get(audience, 0)"),
    ),
    *of(
        "server/umbel_server/releases.py", _POPULATIONS,
        ("an older coordinator's head goes back", "for whose in (audience, audience._replace(population=EVERYBODY)):", "for whose in (audience,):"),
        ("only who stands there goes back", "if written.get(whose) == number:", "if True:"),
        ("a rollout's releases stay listed", "for one in named\n", "for one in named[:0]\n"),
    ),
    *of(
        "server/umbel_server/offers.py", _POPULATIONS,
        ("a rollout moves its own population", "if spec.audience != audience:", "if spec.model != audience.model:"),
    ),
    *of(
        "server/umbel_server/steering.py", _CONTROLLERS,
        ("one controller at a time", "return now < self._leads_until", "return True"),
    ),
    *of(
        "server/umbel_server/rollout_records.py", _CONTROLLERS,
        ("a step on an old revision", "(ROLLOUTS.c.id == before.id) & (ROLLOUTS.c.revision == before.revision)", "(ROLLOUTS.c.id == before.id)"),
    ),
    *of(
        "server/umbel_server/rollout_records.py", _STEERING,
        ("the lease", "if row.holder != holder and now < row.until <= now + seconds:", "if False:"),
        ("an id is used once", "if connection.scalar(sa.select(ROLLOUTS.c.id).where(ROLLOUTS.c.id == rollout.id)):", "if False:"),
    ),
    *of(
        "server/umbel_server/fleet.py", ("tests/rollouts/test_offers.py", *_CONTROLLERS),
        ("devices of all processes", "return sorted((written | {", "return sorted(({"),
        ("other populations' devices are in no wave", "seen = (DEVICES.c.population == population) & was_lately(now)", "seen = was_lately(now)"),
        ("revoked devices are in no wave", "LATELY_SECONDS}) - denied)", "LATELY_SECONDS}))"),
    ),
    *of(
        "server/umbel_server/rollout_verbs.py", (*_STEERING, *_DESK),
        ("a rollout of what is listed", "        if missing:", "        if False:"),
        ("no publishing past a rollout", "if (other := _steering(connection, model, channel, rollout.GOING_FORWARD)) is not None:", "if False:"),
        ("a canary in a small fleet", "if any(wave_of(trial, device) == 0 for device in known):", "if True:"),
    ),
    *of(
        "server/umbel_server/releases.py", _DESK,
        ("the rounds' own channels", "        require_open(channel)\n", ""),
        ("only accepted versions go out", "        require_releasable(version)\n", ""),
        ("a channel's numbers rise", "if number < before:", "if False:"),
        ("the revision of a listing", '            require_revision(connection, call, "release.sign", model)\n', ""),
        ("a listing is submitted once", 'if answered(connection, call, actor, "release.sign", model) is not None:', "if False:"),
    ),
    *of(
        "server/umbel_server/repository.py", _LISTING,
        ("enough signatures", "        self._verify(role, metadata)\n", ""),
        ("one successor", "if metadata.signed.version != current + 1:", "if False:"),
        ("a number is listed once", "            if path in metadata.signed.targets:\n", "            if False:\n"),
        ("listed numbers rise", "release.number < newest:", "False:"),
        ("the root's own keys", '            if role == "root":\n                metadata.verify_delegate(role, metadata)\n', ""),
        ("the keys before", '(role in RULES and metadata.signed.version > 1) or role == "targets"', 'role == "targets"'),
        ("a stolen online key ends", '        elif "timestamp.json" in self.names():', "        elif False:"),
        ("a model's own paths", 'paths=[f"models/{model}/*"]', 'paths=["models/*/*"]'),
        ("signers are named once", "if model in self.models():", "if False:"),
    ),
)  # fmt: skip
