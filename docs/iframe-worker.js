/* The search runs in a worker, which a browser does not start for a page that is opened from a folder. There a hidden frame does its work. */
class IFrameWorker extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.documentElement.append(frame)
    const inside = frame.contentWindow
    inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
    inside.importScripts = (...urls) => urls.reduce((before, next) => before.then(() => this.load(inside, next)), Promise.resolve())
    this.ready = this.load(inside, new URL(url, document.baseURI).href)
    this.inside = inside
  }

  load(inside, src) {
    return new Promise((done, failed) => {
      const script = inside.document.createElement("script")
      Object.assign(script, { src, onload: done, onerror: failed })
      inside.document.documentElement.append(script)
    })
  }

  postMessage(data) {
    this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
  }

  terminate() {
    this.inside.frameElement.remove()
  }
}

if (location.protocol === "file:") window.Worker = window.IFrameWorker = IFrameWorker
