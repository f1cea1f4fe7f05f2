// A device of Umbel in JavaScript: it takes part in rounds, public and private ones.
//
// It only contributes. It trains from the base that an assignment names and adopts nothing: releases by TUF listings,
// offers, trials, personal models, deltas between versions and mirrors are left out. Whether the machine may work now
// (idle, charging, an unmetered network) is for the app to say, by `mayWork`.
//
// One visit, as docs/reference/device-protocol.md draws it: check in; fetch, train and seal; report; sleep.

import { randomBytes } from 'node:crypto';

import { connect } from './enrolment.mjs';
import { goesOn, isOfTheRound, mayPass, Refused, refuseUnless } from './errors.mjs';
import { participantOf, renewAtHelper, sealPrivately, verifyRound, SECURE_SUM } from './private.mjs';
import { bindingOf, seal, SEALED } from './sealing.mjs';
import { Session } from './session.mjs';
import { Shelf } from './shelf.mjs';
import { clipped, countOf, deltaOf, encodeUpdate, judge, requireEnough, train } from './training.mjs';
import { verifyRelease } from './trust.mjs';
import { checkReply } from './wire.mjs';

const HOURS = { earliest_seconds: 3600, latest_seconds: 3 * 3600 };
const SHORTEST_PAUSE = 4;
const LONGEST_PAUSE = 15 * 60;
const KIND_TRAIN = 1;

// What the runtime makes of odd examples ends the session, and is told: it would fail again.
const asRefusal = (error) => {
  throw error instanceof Refused ? error : new Refused('runtime-failure', error.message);
};

export class Device {
  // `examples` is `{ training, heldBack }`; `floors` are what the device itself asks of a private round; `onUpdate` is
  // shown what will be reported, before it is sealed.
  constructor(home, ort, examples, options = {}) {
    const defaults = {
      mayWork: () => true, now: Date.now, random: Math.random, channel: 'stable', floors: {}, onUpdate: async () => {},
    };
    Object.assign(this, { home, ort, examples, ...defaults, ...options });
  }

  // One visit. Gives how it ended, the session's shape and error if there was one, and in how many seconds to come back.
  // It throws what is no part of the conversation, such as a full disk; the next visit goes on from there.
  async visit() {
    if (!this.mayWork()) return { ending: 'not-now', sleep: SHORTEST_PAUSE };
    let connection;
    try {
      const connected = await connect(this.home, this.now());
      connection = connected.connection;
      const visit = await this.#visitAs(connected.identity, connection);
      await this.#remember({ failures: 0 });
      return visit;
    } catch (error) {
      return this.#putOff(error);
    } finally {
      connection?.close();
    }
  }

  async #visitAs(identity, connection) {
    const session = await this.#unfinished() ?? await this.#checkIn(identity, connection);
    const { retry } = session;
    if (retry) return { ending: 'asleep', reason: retry.reason, sleep: this.#within(retry.window) };
    try {
      if (!session.report) await this.#work(session, identity, connection);
      const window = await this.#report(session, connection);
      return { ending: 'contributed', shape: session.shape, sleep: this.#within(window) };
    } catch (error) {
      return this.#endOf(session, error);
    }
  }

  // A session that an earlier visit left behind: gone on with, or told as lost if its time is over.
  async #unfinished() {
    const session = await Session.load(this.home);
    if (!session) return null;
    if (!session.shape.endsWith('!')) await session.add('!');
    // A report that was on its way may count already, so it is asked about whatever the time.
    if (session.report || this.now() < session.assignment.deadline_ms) return session;
    await this.#tell(session);
    return null;
  }

  async #checkIn(identity, connection) {
    const { untold = [] } = await this.#state();
    const participant = await participantOf(this.home);
    const { training, heldBack } = this.examples;
    const reply = checkReply(await connection.checkIn({
      protocol: 1,
      sdk: 'umbel-javascript-proof',
      population: identity.population,
      // Whoever has pinned a helper never sends anything but shares.
      capabilities: { runtimes: ['onnx'], suites: [participant ? SECURE_SUM : SEALED] },
      offers_work: countOf(training) > 0,
      training_examples: countOf(training),
      held_back_examples: countOf(heldBack),
      sessions: untold,
      channel: this.channel,
    }));
    await this.#remember({ untold: [] });
    return reply.assignment ? Session.begin(this.home, reply.assignment) : reply;
  }

  // Verify, fetch, train, seal. Nothing is sent before the sealed bytes lie on the disk.
  async #work(session, identity, connection) {
    const { assignment } = session;
    const { plan } = assignment;
    const release = verifyRelease(assignment.base, identity.release_key);
    await renewAtHelper(this.home, identity.population, this.now());
    const participant = await participantOf(this.home);
    const round = participant && verifyRound(assignment, release, identity, participant, this.floors, this.now());
    const isPublic = !assignment.private_round && assignment.sealing.suite === SEALED;
    refuseUnless(round || isPublic, 'not-allowed', 'this device has pinned no helper: it joins public rounds only');
    const fetch = (...wanted) => connection.fetch(...wanted);
    const bundle = await new Shelf(this.home, fetch).bundle(this.ort, release);
    await session.add('v');
    await session.add('[');
    const update = await this.#learn(bundle, plan).catch(asRefusal);
    await session.add(']');
    await this.onUpdate(update);
    const reportId = randomBytes(16);
    const sealed = round
      ? await sealPrivately(round, participant, reportId, update, plan)
      : await this.#sealOpenly(assignment, release, reportId, update);
    await session.keepReport(reportId.toString('hex'), sealed);
  }

  async #learn(bundle, plan) {
    const { training, heldBack } = this.examples;
    const judged = countOf(heldBack) ? await judge(bundle, plan, heldBack) : {};
    if (plan.kind !== KIND_TRAIN) {
      return { delta: new Float32Array(), metrics: judged, examples: requireEnough(heldBack, plan) };
    }
    const trained = await train(bundle, plan, training, this);
    const delta = clipped(deltaOf(bundle, await bundle.weights(), trained.state), plan.clip_norm);
    return { delta, metrics: { ...judged, ...trained.metrics }, examples: trained.examples };
  }

  async #sealOpenly({ task, round, session_id, sealing, plan }, release, reportId, { delta, metrics, examples }) {
    const body = encodeUpdate({ delta, weight: Math.min(examples, plan.max_weight), metrics });
    const binding = { task, round, session_id, report_id: reportId.toString('hex'), base: release.bundle_digest };
    return seal(sealing.public_key, bindingOf(sealing.public_key, binding), body);
  }

  async #report(session, connection) {
    await session.add('+');
    const window = await connection.report(session.report, await session.sealed());
    await session.add('^');
    await this.#tell(session);
    return window;
  }

  // What becomes of a session that an error stopped. Where nobody answered, or a report may yet be taken before its
  // deadline, it goes on at the next visit.
  async #endOf(session, error) {
    if (!(error instanceof Refused)) throw error;
    const mayYetBeTaken = session.report && mayPass(error) && this.now() < session.assignment.deadline_ms;
    if (goesOn(error) || mayYetBeTaken) {
      await session.add('!');
      throw error;
    }
    await session.add(isOfTheRound(error) ? '#' : '*');
    await this.#tell(session, error.code);
    const sleep = this.#within(session.assignment.if_rejected);
    return { ending: 'refused', shape: session.shape, error: error.code, reason: error.message, sleep };
  }

  // Ends a session: its shape is told at the next check-in.
  async #tell(session, error = '') {
    const { untold = [] } = await this.#state();
    await this.#remember({ untold: [...untold, session.record(error)].slice(-256) });
    await session.forget();
  }

  // A visit that failed is paid again: in hours, or after pauses that grow.
  async #putOff(error) {
    if (!(error instanceof Refused)) throw error;
    const { failures = 0 } = await this.#state();
    await this.#remember({ failures: failures + 1 });
    const pause = Math.min(SHORTEST_PAUSE * 2 ** failures, LONGEST_PAUSE);
    const sleep = this.#within(mayPass(error) ? { earliest_seconds: pause / 4, latest_seconds: pause } : HOURS);
    return { ending: 'failed', error: error.code, reason: error.message, sleep };
  }

  #within({ earliest_seconds, latest_seconds }) {
    return earliest_seconds + this.random() * (latest_seconds - earliest_seconds);
  }

  async #state() {
    return await this.home.load('state.json') ?? {};
  }

  async #remember(news) {
    await this.home.save('state.json', { ...await this.#state(), ...news });
  }
}
