// flowexport::FlowAttention version 1: a TensorRT plugin (IPluginV3, V3ONE) over the kernel.
//
// The same plugin as ../plugin.py: the same name, fields and checks, so that an engine built with
// either runs with the other. Inputs q (B, L, H, D), k (B, S, H, D), v (B, S, H, M); output
// (B, L, H, M); linear; float32, float16 or bfloat16 for all four.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "flow_attention.h"

namespace flowexport {
namespace {

using namespace nvinfer1;

constexpr char kName[] = "FlowAttention";
constexpr char kNamespace[] = "flowexport";
constexpr char kVersion[] = "1";

ILoggerFinder* g_logger_finder = nullptr;

void say(const std::string& text) {
  const std::string message = std::string("plugin FlowAttention: ") + text;
  ILogger* logger = g_logger_finder == nullptr ? nullptr : g_logger_finder->findLogger();
  if (logger != nullptr) {
    logger->log(ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

// FlowVariant's fields.
struct Variant {
  bool relu = false, clamped = false, causal = false, flow_heads = false, competition_heads = false;
  float clamp[2] = {0.0f, 0.0f};
  float eps = 1e-6f, outer_eps = 0.0f;
};

bool read_choice(const PluginField& field, const char* first, const char* second, bool& is_second) {
  const auto* data = static_cast<const char*>(field.data);
  std::string text(data, data == nullptr ? 0 : static_cast<size_t>(field.length));
  while (!text.empty() && text.back() == '\0') text.pop_back();
  if (text != first && text != second) {
    say(std::string(field.name) + " is '" + text + "'; expected '" + first + "' or '" + second +
        "'.");
    return false;
  }
  is_second = text == second;
  return true;
}

bool read_floats(const PluginField& field, int count, float* values) {
  if (field.type != PluginFieldType::kFLOAT32 || field.length != count || field.data == nullptr) {
    say(std::string(field.name) + " has " + std::to_string(field.length) + " values; expected " +
        std::to_string(count) + " of float32.");
    return false;
  }
  std::memcpy(values, field.data, sizeof(float) * static_cast<size_t>(count));
  return true;
}

bool read_fields(const PluginFieldCollection& fields, Variant& v) {
  for (int i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    const std::string name = field.name == nullptr ? "" : field.name;
    bool good = true;
    if (name == "feature_map") {
      good = read_choice(field, "sigmoid", "relu", v.relu);
    } else if (name == "flow_axis") {
      good = read_choice(field, "tokens", "heads", v.flow_heads);
    } else if (name == "competition_axis") {
      good = read_choice(field, "tokens", "heads", v.competition_heads);
    } else if (name == "eps") {
      good = read_floats(field, 1, &v.eps);
    } else if (name == "outer_eps") {
      good = read_floats(field, 1, &v.outer_eps);
    } else if (name == "clamp") {
      if (field.length > 0) {
        good = read_floats(field, 2, v.clamp);
        v.clamped = true;
      }
    } else if (name == "causal") {
      if (field.data == nullptr || field.length != 1) {
        good = false;
      } else if (field.type == PluginFieldType::kINT32) {
        v.causal = *static_cast<const int32_t*>(field.data) != 0;
      } else if (field.type == PluginFieldType::kINT64) {
        v.causal = *static_cast<const int64_t*>(field.data) != 0;
      } else {
        good = false;
      }
      if (!good) say("causal is no single integer.");
    } else if (name != "plugin_version" && name != "plugin_namespace" &&
               name != "kernel_source_sha256" && name != "kernel_library") {
      say("unknown field '" + name + "'.");
      good = false;
    }
    if (!good) return false;
  }
  return true;
}

bool same(int64_t a, int64_t b) { return a < 0 || b < 0 || a == b; }

// -1 stands for a dimension that is not known yet.
bool check_shapes(const Dims& q, const Dims& k, const Dims& v) {
  if (q.nbDims != 4 || k.nbDims != 4 || v.nbDims != 4) {
    say("q, k, v must have 4 dimensions (B, N, H, D).");
    return false;
  }
  if (!same(q.d[0], k.d[0]) || !same(k.d[0], v.d[0]) || !same(q.d[2], k.d[2]) ||
      !same(k.d[2], v.d[2]) || !same(k.d[1], v.d[1]) || q.d[3] != k.d[3]) {
    say("q, k, v do not fit: expected (B, L, H, D), (B, S, H, D), (B, S, H, M).");
    return false;
  }
  if (q.d[3] < 1 || q.d[3] > 128 || v.d[3] < 1 || v.d[3] > 128) {
    say("the widths must be fixed, from 1 to 128.");
    return false;
  }
  return true;
}

class FlowAttentionPlugin final : public IPluginV3,
                                  public IPluginV3OneCore,
                                  public IPluginV3OneBuild,
                                  public IPluginV3OneRuntime {
 public:
  explicit FlowAttentionPlugin(const Variant& variant) : variant_(variant) {}
  FlowAttentionPlugin(const FlowAttentionPlugin& other) : FlowAttentionPlugin(other.variant_) {}
  FlowAttentionPlugin& operator=(const FlowAttentionPlugin&) = delete;

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) FlowAttentionPlugin(*this); }

  const AsciiChar* getPluginName() const noexcept override { return kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                             int32_t input_count) const noexcept override {
    if (output_count != 1 || input_count != 3) return -1;
    outputs[0] = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                          DimsExprs* outputs, int32_t output_count,
                          IExprBuilder&) noexcept override {
    if (input_count != 3 || output_count != 1) return -1;
    for (int i = 0; i < 3; ++i)
      if (inputs[i].nbDims != 4) {
        say("q, k, v must have 4 dimensions (B, N, H, D).");
        return -1;
      }
    outputs[0].nbDims = 4;
    for (int i = 0; i < 3; ++i) outputs[0].d[i] = inputs[0].d[i];
    outputs[0].d[3] = inputs[2].d[3];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const PluginTensorDesc& one = tensors[position].desc;
    return one.format == TensorFormat::kLINEAR && one.type == tensors[0].desc.type &&
           (one.type == DataType::kFLOAT || one.type == DataType::kHALF ||
            one.type == DataType::kBF16);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const DynamicPluginTensorDesc*, int32_t) noexcept override {
    if (input_count != 3) return -1;
    const bool good = check_shapes(inputs[0].desc.dims, inputs[1].desc.dims, inputs[2].desc.dims) &&
                      described(inputs[0].min, inputs[1].min, inputs[2].min, DataType::kFLOAT) &&
                      described(inputs[0].max, inputs[1].max, inputs[2].max, DataType::kFLOAT);
    return good ? 0 : -1;
  }

  // Of the profile's maximum; the kernel's answer serves every smaller problem too.
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                          const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    if (!described(inputs[0].max, inputs[1].max, inputs[2].max, DataType::kFLOAT)) return 0;
    return flowexport_flow_attention_workspace(&problem_);
  }

  int32_t setTactic(int32_t) noexcept override { return 0; }

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                        const PluginTensorDesc*, int32_t) noexcept override {
    if (input_count != 3) return -1;
    return described(inputs[0].dims, inputs[1].dims, inputs[2].dims, inputs[0].type) ? 0 : -1;
  }

  int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*,
                  const void* const* data, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    if (!described(inputs[0].dims, inputs[1].dims, inputs[2].dims, inputs[0].type)) return -1;
    const int status = flowexport_flow_attention_launch(
        &problem_, data[0], data[1], data[2], outputs[0], workspace,
        flowexport_flow_attention_workspace(&problem_), stream);
    if (status != 0) say(std::string("launch: ") + flowexport_flow_attention_status(status) + ".");
    return status;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    causal_ = variant_.causal ? 1 : 0;
    fields_.clear();
    const auto text = [this](const char* name, const char* value) {
      fields_.emplace_back(name, value, PluginFieldType::kCHAR,
                           static_cast<int32_t>(std::strlen(value)));
    };
    text("feature_map", variant_.relu ? "relu" : "sigmoid");
    text("flow_axis", variant_.flow_heads ? "heads" : "tokens");
    text("competition_axis", variant_.competition_heads ? "heads" : "tokens");
    fields_.emplace_back("eps", &variant_.eps, PluginFieldType::kFLOAT32, 1);
    fields_.emplace_back("outer_eps", &variant_.outer_eps, PluginFieldType::kFLOAT32, 1);
    fields_.emplace_back("causal", &causal_, PluginFieldType::kINT32, 1);
    if (variant_.clamped)
      fields_.emplace_back("clamp", variant_.clamp, PluginFieldType::kFLOAT32, 2);
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  // Fill problem_ and say what is wrong with it.
  bool described(const Dims& q, const Dims& k, const Dims& v, DataType type) const {
    if (!check_shapes(q, k, v)) return false;
    flowexport_flow_attention_problem p = {};
    p.batch = q.d[0], p.sinks = q.d[1], p.sources = k.d[1], p.heads = q.d[2];
    p.width = static_cast<int32_t>(q.d[3]), p.value_width = static_cast<int32_t>(v.d[3]);
    p.dtype = type == DataType::kHALF   ? FLOWEXPORT_FLOAT16
              : type == DataType::kBF16 ? FLOWEXPORT_BFLOAT16
                                        : FLOWEXPORT_FLOAT32;
    p.feature_map = variant_.relu ? FLOWEXPORT_RELU : FLOWEXPORT_SIGMOID;
    p.clamped = variant_.clamped, p.causal = variant_.causal;
    p.flow_over_heads = variant_.flow_heads;
    p.competition_over_heads = variant_.competition_heads;
    p.clamp_low = variant_.clamp[0], p.clamp_high = variant_.clamp[1];
    p.eps = variant_.eps, p.outer_eps = variant_.outer_eps;
    const char* wrong = flowexport_flow_attention_check(&p);
    if (wrong != nullptr) {
      say(std::string(wrong) + ".");
      return false;
    }
    problem_ = p;
    return true;
  }

  Variant variant_;
  mutable flowexport_flow_attention_problem problem_ = {};
  int32_t causal_ = 0;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_ = {};
};

class FlowAttentionCreator final : public IPluginCreatorV3One {
 public:
  FlowAttentionCreator() {
    for (const char* name : {"feature_map", "flow_axis", "competition_axis"})
      fields_.emplace_back(name, nullptr, PluginFieldType::kCHAR, 1);
    for (const char* name : {"eps", "outer_eps"})
      fields_.emplace_back(name, nullptr, PluginFieldType::kFLOAT32, 1);
    fields_.emplace_back("clamp", nullptr, PluginFieldType::kFLOAT32, 2);
    fields_.emplace_back("causal", nullptr, PluginFieldType::kINT32, 1);
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  IPluginV3* createPlugin(const AsciiChar*, const PluginFieldCollection* fields,
                          TensorRTPhase) noexcept override {
    Variant variant;
    if (fields == nullptr || !read_fields(*fields, variant)) return nullptr;
    return new (std::nothrow) FlowAttentionPlugin(variant);
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const AsciiChar* getPluginName() const noexcept override { return kName; }
  const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_ = {};
};

}  // namespace
}  // namespace flowexport

// What loaders of plugin libraries look for.
extern "C" FLOWEXPORT_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  flowexport::g_logger_finder = finder;
}

extern "C" FLOWEXPORT_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static flowexport::FlowAttentionCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
