/**
 * Builds dist/: the page, its workers, the service worker, and only the wasm that is used.
 *
 * File names below assets/ carry the hash of their content, so that they never go stale;
 * each file that shrinks has a `.gz` beside it for the server.
 */
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { cp, mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { gzip } from "node:zlib";

const ROOT = path.dirname(fileURLToPath(import.meta.url));
const DIST = path.join(ROOT, "dist");
const ASSETS = path.join(DIST, "assets");
const require = createRequire(import.meta.url);
const pressed = promisify(gzip);

const ORT = path.dirname(require.resolve("onnxruntime-web/ort-wasm-simd-threaded.wasm"));
const LITERT = path.join(ROOT, "node_modules/@litertjs/core");
const PACKED = new Set([".html", ".js", ".mjs", ".css", ".wasm", ".svg", ".webmanifest"]);

const common = {
  bundle: true,
  minify: true,
  write: false,
  target: ["es2022"],
  legalComments: "none",
  conditions: ["onnxruntime-web-use-extern-wasm"],
  define: { "process.env.NODE_ENV": '"production"' },
  logLevel: "warning",
};

await rm(DIST, { recursive: true, force: true });
await mkdir(ASSETS, { recursive: true });

const versions = {
  demo: (await json(path.join(ROOT, "package.json"))).version,
  ort: (await json(path.join(ORT, "../package.json"))).version,
  litert: (await json(path.join(LITERT, "package.json"))).version,
};

const assets = {
  versions,
  ortWasm: {
    mjs: await copy(path.join(ORT, "ort-wasm-simd-threaded.mjs")),
    wasm: await copy(path.join(ORT, "ort-wasm-simd-threaded.wasm")),
  },
  ortWebgpu: {
    mjs: await copy(path.join(ORT, "ort-wasm-simd-threaded.asyncify.mjs")),
    wasm: await copy(path.join(ORT, "ort-wasm-simd-threaded.asyncify.wasm")),
  },
  litert: await copyLitert(),
  ortWasmWorker: await bundle("src/backends/ort-wasm.worker.js", { format: "iife" }),
  ortWebgpuWorker: await bundle("src/backends/ort-webgpu.worker.js", { format: "iife" }),
  litertWorker: await bundle("src/backends/litert.worker.js", { format: "iife" }),
};

const app = await bundle("src/app.js", {
  format: "esm",
  define: { ...common.define, __ASSETS__: JSON.stringify(assets) },
});
const style = await bundle("src/style.css", {});
const icon = await copy(path.join(ROOT, "src/icon.svg"));
const webmanifest = await emit("app.webmanifest", JSON.stringify({
  name: "Flowformer in your browser",
  short_name: "Flowformer",
  start_url: "../",
  scope: "../",
  display: "standalone",
  background_color: "#f6f4ef",
  theme_color: "#0f766e",
  icons: [{ src: path.basename(icon), sizes: "any", type: "image/svg+xml" }],
}));

const page = (await readFile(path.join(ROOT, "src/index.html"), "utf8"))
  .replaceAll("{{app}}", app)
  .replaceAll("{{style}}", style)
  .replaceAll("{{icon}}", icon)
  .replaceAll("{{webmanifest}}", webmanifest);
await writeFile(path.join(DIST, "index.html"), page);

// The shell is kept when the worker installs; runtimes and models once the page has them.
const shell = ["./", app, style, icon, webmanifest, assets.ortWasmWorker, assets.litertWorker, assets.ortWasm.mjs];
const worker = await build({
  ...common,
  entryPoints: [path.join(ROOT, "src/sw.js")],
  format: "iife",
  define: {
    __SHELL__: JSON.stringify(shell),
    __VERSION__: JSON.stringify(hash(page + JSON.stringify(assets))),
  },
});
await writeFile(path.join(DIST, "sw.js"), worker.outputFiles[0].contents);

for (const file of await readdir(DIST, { recursive: true, withFileTypes: true })) {
  if (!file.isFile() || !PACKED.has(path.extname(file.name))) continue;
  const place = path.join(file.parentPath, file.name);
  await writeFile(`${place}.gz`, await pressed(await readFile(place), { level: 9 }));
}
console.log(`dist: ${app}, ONNX Runtime Web ${versions.ort}, LiteRT.js ${versions.litert}`);

async function bundle(entry, options) {
  const result = await build({ ...common, ...options, entryPoints: [path.join(ROOT, entry)] });
  return emit(path.basename(entry), result.outputFiles[0].contents);
}

async function copy(file) {
  return emit(path.basename(file), await readFile(file));
}

/** LiteRT's loader picks its file by name, so its folder, not its files, carries the hash. */
async function copyLitert() {
  const folder = `assets/litert-${versions.litert}/`;
  await mkdir(path.join(DIST, folder));
  for (const variant of ["internal", "compat_internal", "threaded_internal"]) {
    for (const ext of ["js", "wasm"]) {
      const name = `litert_wasm_${variant}.${ext}`;
      await cp(path.join(LITERT, "wasm", name), path.join(DIST, folder, name));
    }
  }
  return folder;
}

async function emit(name, content) {
  const { name: stem, ext } = path.parse(name);
  const place = `assets/${stem}-${hash(content)}${ext}`;
  await writeFile(path.join(DIST, place), content);
  return place;
}

function hash(content) {
  return createHash("sha256").update(content).digest("hex").slice(0, 10);
}

async function json(file) {
  return JSON.parse(await readFile(file, "utf8"));
}
